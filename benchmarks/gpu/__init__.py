"""The round on a GPU: one resumable command that builds, proves and measures, and its dry form."""
