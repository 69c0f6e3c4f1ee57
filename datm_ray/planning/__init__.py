"""Planning before a run starts: will it fit into memory, how long does it take, and on which machines?"""
