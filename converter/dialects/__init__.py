"""How each trainer names, stores and configures a reward or critic head: one literal a file, found by entry point."""
