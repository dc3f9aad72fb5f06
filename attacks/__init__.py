"""What leaks: attacks replayed on what each adversary really saw.

Reads securefl and protocols; neither of them imports it.
"""
