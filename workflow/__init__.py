"""What surrounds the model in `SmolLm3.py`, one folder a chapter.

Imports go one way: tools → proof → training → analysis → data → reference → config →
files → errors → SmolLm3.
Environment variables that must be set before torch is imported belong here: import this first.
"""
