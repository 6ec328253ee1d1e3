"""What runs at the vendor: keys and sealing."""
