"""Low-rank adapters on PEFT's conventions: LoRA, and CE-LoRA, whose backward pass is cheaper."""
