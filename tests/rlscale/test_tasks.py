"""Tasks: their answers checked by independent solvers, their splits, their scores, and the tokenizer."""

from __future__ import annotations

import pickle
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlscale.errors import UserError
from rlscale.tasks import (
    TASKS,
    build_tokenizer,
    decode_completion,
    describe_task,
    encode_prompt,
    encode_text,
    list_tasks,
    make_task,
    split_of,
)
from rlscale.tasks.base import SPLITS, Task
from rlscale.tasks.synthetic import STACK_NAMES, SYMBOLS
from rlscale.tasks.tokenizer import CHARACTERS
from rlscale.types import Problem

TOKENIZER = build_tokenizer()


def solve(name: str, prompt: str, modulus: int = 10) -> str:
    """Answers from the prompt alone, written apart from the tasks."""
    assert prompt[-1] == "="
    body = prompt[:-1]
    if name == "reversal":
        return "".join(reversed(body))
    if name == "sorting":
        counts = Counter(body)
        return "".join(symbol * counts[symbol] for symbol in SYMBOLS)
    if name == "recall":
        pairs, queries = body.split("|")
        return "".join(pairs[pairs.index(query) + 1] for query in queries)
    if name == "running_sum":
        return "".join(
            "0123456789abcdefghijklmnopqrstuvwxyz"[sum(int(c, 36) for c in body[: i + 1]) % modulus]
            for i in range(len(body))
        )
    if name == "countdown":
        word, left = re.fullmatch(r"([a-z]+)([0-9A-F]+)", body).groups()
        rows = ""
        while int(left[::-1], 16):
            left = f"{int(left[::-1], 16) - 1:0{len(left)}X}"[::-1]
            rows += word + left
        return rows
    assert name == "stack"
    popped = ""
    for at in range(1, len(body), 2):
        if body[at] == "-":
            # The matching push is the nearest one before whose stack has seen as many pops as pushes since.
            depth, back = 1, at
            while depth:
                back -= 2
                if body[back - 1] == body[at - 1]:
                    depth += 1 if body[back] == "-" else -1
            popped += body[back]
    return popped


def possible(name: str, length: int) -> int:
    """The next length that the task can have: rows of a countdown have eight tokens."""
    return -(-length // 8) * 8 if name == "countdown" else length


@pytest.mark.parametrize("name", list_tasks())
@settings(max_examples=40, deadline=None)
@given(length=st.integers(3, 90), key=st.integers(0, 2**62), split=st.sampled_from(SPLITS))
def test_the_answer_is_what_an_independent_solver_finds_and_has_the_required_length(name, length, key, split):
    length = possible(name, length)
    problem = make_task(name, length, {}).problem(split, key)
    assert problem.answer == solve(name, problem.prompt)
    assert (
        len(encode_text(TOKENIZER, problem.answer))
        == len(problem.answer)
        == problem.required_length
        == length
    )


@settings(max_examples=40, deadline=None)
@given(length=st.integers(8, 60), data=st.data())
def test_answers_stay_right_under_every_difficulty_option(length, data):
    choices = {
        "reversal": {"alphabet": data.draw(st.integers(2, 62))},
        "sorting": {"alphabet": data.draw(st.integers(60, 62)), "distinct": data.draw(st.booleans())},
        "recall": {"pairs": data.draw(st.integers(4, 52)), "values": data.draw(st.integers(2, 40))},
        "stack": {"stacks": data.draw(st.integers(1, 64)), "elements": data.draw(st.integers(2, 26))},
        "running_sum": {"modulus": data.draw(st.integers(2, 36))},
        "countdown": {
            "letters": (half := data.draw(st.sampled_from([2, 4]))),
            "digits": half,
            "alphabet": 20,
        },
    }
    assert choices.keys() == TASKS.keys()
    for name, options in choices.items():
        task = make_task(name, possible(name, length), options)
        problem = task.problem("train", data.draw(st.integers(0, 2**40)))
        assert problem.answer == solve(name, problem.prompt, choices["running_sum"]["modulus"])


def test_options_set_what_they_say():
    assert set(make_task("reversal", 400, {"alphabet": 3}).problem("train", 0).answer) == set("abc")
    assert (
        len(set(make_task("sorting", 30, {"alphabet": 30, "distinct": True}).problem("train", 1).answer))
        == 30
    )
    recall = make_task("recall", 200, {"pairs": 17, "values": 2}).problem("train", 2)
    assert len(recall.prompt) == 2 * 17 + 1 + 200 + 1
    assert set(recall.answer) == set("01")
    stack = make_task("stack", 900, {"stacks": 64}).problem("train", 3)
    assert set(stack.prompt[:-1:2]) == set(STACK_NAMES[:64])
    assert len(set(STACK_NAMES[:64])) == 64
    assert set(make_task("running_sum", 400, {"modulus": 12}).problem("train", 4).answer) == set(
        "0123456789ab"
    )
    counted = make_task("countdown", 60, {"letters": 1, "alphabet": 9, "base": 3, "digits": 3}).problem(
        "train", 5
    )
    assert re.fullmatch(r"[a-i]021=", counted.prompt)  # 15 is 120 to base 3, written from its end
    assert counted.answer[:12].replace(counted.prompt[0], "-") == "-211-111-011"
    assert counted.answer.endswith("000")


def test_problems_do_not_depend_on_the_process():
    script = (
        "from rlscale.tasks import *; print([make_task(n, 16, {}).problem('train', 7) for n in list_tasks()])"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "1"},
    )
    assert other.stdout.strip() == str([make_task(name, 16, {}).problem("train", 7) for name in list_tasks()])


@pytest.mark.parametrize("name", list_tasks())
def test_no_prompt_is_in_two_splits_even_where_prompts_are_few(name):
    task = make_task(name, possible(name, 3), {"modulus": 4} if name == "running_sum" else {})
    prompts = {split: {task.problem(split, key).prompt for key in range(300)} for split in SPLITS}
    for split in SPLITS:
        assert all(split_of(prompt) == split for prompt in prompts[split])
    assert not prompts["train"] & (prompts["held_out"] | prompts["validation"])
    assert not prompts["held_out"] & prompts["validation"]


def test_keys_lengths_and_options_give_different_problems():
    task = make_task("reversal", 24, {})
    assert len({task.problem("train", key).prompt for key in range(500)}) == 500
    assert make_task("reversal", 24, {"alphabet": 25}).problem("train", 0) != task.problem("train", 0)
    assert make_task("reversal", 23, {}).problem("train", 0).answer not in task.problem("train", 0).answer


def test_a_space_too_small_for_a_split_is_an_error_with_the_remedy():
    task = make_task("reversal", 1, {"alphabet": 2})
    with pytest.raises(UserError, match=r"too few different problems .* raise required_length"):
        [task.problem(split, 0) for split in SPLITS]


def test_exact_reward_is_for_the_answer_alone():
    task = make_task("reversal", 12, {})
    problem = task.problem("train", random.randrange(2**40))
    answer = problem.answer
    assert task.score(problem, answer, "exact") == task.score(problem, answer, "prefix") == 1.0
    for wrong in (
        answer[:-1],
        answer + "a",
        "",
        answer[::-1] + "x",
        " " + answer,
        answer + "\n",
        answer.upper(),
    ):
        assert task.score(problem, wrong, "exact") == 0.0
        assert task.score(problem, wrong, "prefix") < 1.0


@given(right=st.integers(0, 9), tail=st.text("xyz", max_size=30))
def test_prefix_reward_counts_up_to_the_first_error(right, tail):
    task = make_task("reversal", 10, {})
    problem = Problem("abcdeabcde=", "edcbaedcba", 10, 0)
    assert task.score(problem, problem.answer[:right] + tail, "prefix") == right / 10
    assert task.score(problem, problem.answer + "x" + tail, "prefix") == 9 / 10


@given(right=st.integers(0, 9), tail=st.text("xyz", max_size=30))
def test_half_of_prefix_and_exact_is_for_the_answer_alone(right, tail):
    task = make_task("reversal", 10, {})
    problem = Problem("abcdeabcde=", "edcbaedcba", 10, 0)
    assert task.score(problem, problem.answer, "prefix_and_exact") == 1.0
    assert task.score(problem, problem.answer[:right] + tail, "prefix_and_exact") == right / 20
    assert task.score(problem, problem.answer + "x" + tail, "prefix_and_exact") == 9 / 20


@pytest.mark.parametrize("name", ["reversal", "countdown"])
@given(st.integers(0, 15), st.text("abc012", max_size=9))
def test_what_follows_the_first_error_changes_no_score(name, right, tail):
    task = make_task(name, 16, {})
    problem = task.problem("train", 0)
    settled = problem.answer[:right] + "x"
    assert task.settled(problem, settled + tail) == right + 1
    assert task.score(problem, settled + tail, "prefix") == task.score(problem, settled, "prefix")
    for rightly in (problem.answer, problem.answer[:right]):
        assert task.settled(problem, rightly) == len(rightly)
    assert task.settled(problem, problem.answer + tail) == 16 + bool(tail)


@pytest.mark.parametrize(
    ("name", "length", "options", "message"),
    [
        ("reversl", 8, {}, "unknown task 'reversl': Did you mean 'reversal'"),
        ("reasoning_gym/chain_sums", 8, {}, "Did you mean 'reasoning_gym/chain_sum'"),
        (
            "",
            8,
            {},
            "Known are reversal, sorting, recall, stack, running_sum, countdown and reasoning_gym/NAME",
        ),
        ("reversal", 0, {}, "required_length=0 is impossible, valid: 1 or more"),
        ("sorting", 27, {"alphabet": 26, "distinct": True}, "required_length=27 .* valid: 1 to 26"),
        ("reversal", 8, {"alphabets": 26}, "unknown option 'alphabets', known are alphabet"),
        ("reversal", 8, {"alphabet": 63}, r"option alphabet: .* less than or equal to 62 \(given: 63\)"),
        ("stack", 8, {"stacks": 65}, "option stacks: .* 64"),
        ("countdown", 88, {"letters": 8, "alphabet": 7}, "words of 8 different letters need an alphabet"),
        ("countdown", 12, {}, "required_length=12 is impossible, valid: multiples of 8"),
        ("countdown", 36, {"letters": 1, "base": 3, "digits": 2}, "valid: 1 to 24 .rows counted in 2 digits"),
        ("reasoning_gym/chain_sum", 8, {"terms": 2}, "unknown option 'terms', known are min_terms"),
        ("reasoning_gym/chain_sum", 8, {"seed": 2}, "unknown option 'seed'"),
        ("reasoning_gym/chain_sum", 8, {"min_terms": 9, "max_terms": 2}, "refuses the options"),
        ("reasoning_gym/composite", 8, {}, "refuses the options"),
    ],
)
def test_impossible_tasks_are_refused_with_the_remedy(name, length, options, message):
    with pytest.raises(UserError, match=message) as error:
        make_task(name, length, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dataset", ["chain_sum", "gcd", "list_functions"])
def test_reasoning_gym_datasets_are_tasks_with_their_own_scorer(dataset):
    task = make_task(f"reasoning_gym/{dataset}", 24, {})
    problems = {split: [task.problem(split, key) for key in range(12)] for split in SPLITS}
    assert not {p.prompt for p in problems["train"]} & {p.prompt for p in problems["held_out"]}
    fresh = make_task(f"reasoning_gym/{dataset}", 24, {})
    for split in SPLITS:
        for key, problem in enumerate(problems[split]):
            assert 1 <= len(problem.answer) == problem.required_length <= 24
            assert fresh.score(problem, problem.answer, "exact") == 1.0  # scored before it was drawn there
            assert fresh.score(problem, "?" + problem.answer, "exact") == 0.0
            assert fresh.problem(split, key) == problem


def test_reasoning_gym_partial_scores_earn_nothing_exactly():
    task = make_task("reasoning_gym/countdown", 40, {})
    problem = task.problem("train", 3)
    # Some other right expression than the reference: its factors and terms in parentheses.
    assert task.score(problem, f"({problem.answer})", "exact") == 1.0
    assert task.score(problem, "1", "exact") == 0.0
    assert task.score(problem, ")(", "exact") == 0.0


def test_answers_longer_than_a_reasoning_gym_bound_are_an_error_with_the_remedy():
    with pytest.raises(UserError, match=r"required_length=2: the shortest of \d+ answers has \d+ tokens"):
        make_task("reasoning_gym/word_sorting", 2, {}).problem("train", 0)


@pytest.mark.parametrize("name", [*list_tasks(), "reasoning_gym/gcd"])
def test_tasks_travel_between_processes(name):
    task = make_task(name, 16, {})
    copy: Task = pickle.loads(pickle.dumps(task))
    assert copy.problem("held_out", 5) == task.problem("held_out", 5)


def test_descriptions_name_every_option_with_its_default():
    for name in list_tasks():
        info = describe_task(name)
        assert info.summary
        assert info.lengths
        assert [option.name for option in info.options] == list(TASKS[name].Options.model_fields)
        assert all(option.description and option.default for option in info.options)
    options = {option.name: option.default for option in describe_task("reasoning_gym/chain_sum").options}
    assert options["min_terms"] == "2"
    assert "seed" not in options


@pytest.mark.parametrize("name", list_tasks())
def test_summaries_show_a_true_example(name):
    prompt, answer = re.search(r"(\S+=) gives (\w+)", describe_task(name).summary).groups()
    assert solve(name, prompt) == answer


@given(
    st.text(CHARACTERS, max_size=200) | st.sampled_from(["<eos>", "a<pad>b", "<unk>", "<unused99>", " a  b "])
)
def test_text_survives_the_tokenizer_character_by_character(text):
    ids = encode_text(TOKENIZER, text)
    assert len(ids) == len(text)
    assert decode_completion(TOKENIZER, ids) == text
    assert not set(ids) & {0, 1, 2}
    assert encode_prompt(TOKENIZER, text) == [1, *ids]


def test_the_vocabulary_has_128_entries_and_survives_saving(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (TOKENIZER, loaded):
        assert len(tokenizer) == tokenizer.vocab_size == 128
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        spelled = [3 + CHARACTERS.index(character) for character in "<eos>"]
        assert encode_prompt(tokenizer, CHARACTERS + "<eos>") == [1, *range(3, 99), *spelled]


@pytest.mark.parametrize("outside", ["é", "\t", "🦀", "\x7f", "\r"])
def test_a_character_outside_the_vocabulary_is_an_error_that_names_it(outside):
    with pytest.raises(UserError, match="the tokenizer has no token for") as error:
        encode_prompt(TOKENIZER, f"abc{outside}def")
    assert repr(outside) in str(error.value)
    assert "\n" not in str(error.value)


def test_special_tokens_inside_a_completion_stay_visible():
    problem = Problem("ab=", "ba", 2, 0)
    b, a = encode_text(TOKENIZER, "ba")
    assert decode_completion(TOKENIZER, [b, a, 2]) == "ba"
    for wrong in ([b, 0, a, 2], [b, a, 2, 2], [b, a, 127], [1, b, a]):
        assert (
            make_task("reversal", 2, {}).score(problem, decode_completion(TOKENIZER, wrong), "exact") == 0.0
        )


def test_only_zebra_puzzles_need_the_sat_solver_that_has_to_be_compiled() -> None:
    code = """
import sys
sys.modules["pycosat"] = None  # as if it could not be installed
from rlscale.errors import UserError
from rlscale.tasks import make_task
assert make_task("reasoning_gym/chain_sum", 10, {}).problem("train", 0).answer
try:
    make_task("reasoning_gym/zebra_puzzles", 50, {})
except UserError as error:
    sys.exit("pip install pycosat" not in str(error))
sys.exit("no error")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
