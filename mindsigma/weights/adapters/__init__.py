"""LoRA and DoRA adapters of every naming: read, written, merged."""
