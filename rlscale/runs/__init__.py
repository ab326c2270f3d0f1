"""What a run leaves on disk: written by `RunFolder`, read back by `read_run` and `find_runs`."""

from rlscale.runs.folder import Progress, RunFolder
from rlscale.runs.reading import RunRecord, find_runs, read_run

__all__ = ["Progress", "RunFolder", "RunRecord", "find_runs", "read_run"]
