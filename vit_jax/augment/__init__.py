"""What is done to a batch of pictures on the device, inside the compiled step."""
