"""What both the configuration and the library take as defaults; imports nothing."""

# CE-LoRA's paper (arXiv:2502.01378) approximates these and leaves q, k and gate alone.
PAPER_KEEP_RATIOS = {"v_proj": 0.55, "o_proj": 0.55, "up_proj": 0.65, "down_proj": 0.65}

# The linear layers of KDA, MLA and the dense MLPs, by the names of the released checkpoint.
TARGET_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
