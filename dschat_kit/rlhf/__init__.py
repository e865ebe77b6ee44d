"""Plain torch mathematics of RLHF. Models come in as callables; nothing here knows DeepSpeed, files or ranks.

Shapes: B sequences, T prompt + response, A response tokens, V vocabulary. Masks are bool; True is a real token.
"""
