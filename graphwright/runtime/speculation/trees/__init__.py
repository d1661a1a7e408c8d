"""Which draft tokens are verified together: one file a kind of tree; a file that is added here is found."""
