"""What the vendor ships: manifest, encryption and signature, read and written here only."""
