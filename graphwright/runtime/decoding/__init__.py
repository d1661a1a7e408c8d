"""The decode loop: one loop for plain and speculative generation, and the teacher-forced passes."""
