"""gpt2-compress: make pretrained GPT-2 checkpoints smaller and faster, and prove what that cost."""

__version__ = "0.1.0"
