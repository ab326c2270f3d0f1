"""What a run would cost on a cluster, before it is paid for: `rlscale plan`."""
