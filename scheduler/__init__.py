"""What crosses the link and when. Installed as ``offload_triforce.scheduler``."""
