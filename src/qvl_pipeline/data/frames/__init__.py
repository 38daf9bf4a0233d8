"""From clips to the frame store."""
