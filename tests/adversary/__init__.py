"""A hostile host against the enclave: each test asks how the enclave could be wrong, and is named after the attack."""
