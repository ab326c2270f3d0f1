from kimi_linear.config import preset
from kimi_linear.flops import generation_flops, training_flops
from rlscale.flops import step_flops
from rlscale.types import Completion, Rollout


def test_a_step_costs_every_completions_generation_and_one_gradient_of_the_batch() -> None:
    model = preset("tiny")
    rollouts = [
        Rollout([1] * prompt, Completion([2] * n, [0.0] * n, [0] * n, "stop"), 1.0, group)
        for group, (prompt, n) in enumerate([(10, 5), (12, 0), (9, 30)])
    ]
    flops = step_flops(model, rollouts, rollouts)
    assert (
        flops["rollout_flops"] == generation_flops(model, 10, 5).total + generation_flops(model, 9, 30).total
    )
    assert flops["train_flops"] == training_flops(model, [15, 12, 39], predicted=35).total
    assert step_flops(model, rollouts, rollouts[:1]) == {
        "rollout_flops": flops["rollout_flops"],
        "train_flops": training_flops(model, [15], predicted=5).total,
    }
    assert step_flops(model, [], []) == {"rollout_flops": 0, "train_flops": 0}
