"""Kimi Linear: Kimi Delta Attention (KDA) and multi-head latent attention (MLA), the model and its kernels."""
