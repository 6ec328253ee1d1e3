"""Facts about decoders, shared by all parties: plans, families, splitting one model into prefix, blocks and head."""
