"""Measurements that anyone can repeat: each is one command, and says on what it was taken."""
