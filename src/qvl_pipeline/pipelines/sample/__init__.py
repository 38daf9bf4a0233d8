"""Stage `sample`: decode every clip once, and keep the frames the model sees."""
