"""What the commands of ``diffalign`` do; each module is imported when its command is called."""
