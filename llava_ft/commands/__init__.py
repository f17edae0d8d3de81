"""What each command of `llava-ft` takes: its flags, and what they are handed to.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""
