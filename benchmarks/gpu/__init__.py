"""The GPU validation run: one resumable command that builds, proves and measures, and its dry form."""
