"""Stage `tokenize`: token ids and trained spans of every sample, and the plan of every optimizer step."""
