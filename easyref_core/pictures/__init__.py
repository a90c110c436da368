"""Pictures: files, preprocessing for the MLLM, crops, and the list that a gallery stores."""
