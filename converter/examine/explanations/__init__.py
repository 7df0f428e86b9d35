"""What trainers' messages mean: the texts as they are printed, the fault behind each, and what to do."""
