"""What runs on the customer's untrusted side: engines and the launcher of a development enclave."""
