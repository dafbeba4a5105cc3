"""The SQL tables: sessions, runs, operations (the journal), checkpoints, samplers."""
