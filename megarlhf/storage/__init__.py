"""What a run leaves on disk: small files that are whole or not there, and tensors with their checksums."""
