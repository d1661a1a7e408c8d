"""How many tokens a row drafts: one file a length rule; a file that is added here is found."""
