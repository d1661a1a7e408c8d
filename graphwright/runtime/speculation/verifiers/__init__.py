"""How drawn drafts are verified: one file a rule; a file that is added here is found."""
