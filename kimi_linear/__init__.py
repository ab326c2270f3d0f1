"""Kimi Linear: Kimi Delta Attention (KDA) with multi-head latent attention (MLA), model and kernels."""
