"""Who guesses: one file a drafter; a file that is added here is found."""
