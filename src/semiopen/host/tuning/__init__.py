"""Tuning on private data: LoRA on the open blocks, over states that the enclave computes once."""
