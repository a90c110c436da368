"""What ties EasyRef to its host: folders, memory management, attention patches."""
