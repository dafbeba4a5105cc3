"""Makes the base model that ships with Holdfast: its text, its tokenizer, its weights."""
