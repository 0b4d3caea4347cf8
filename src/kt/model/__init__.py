"""The traced model: loading it, where its parts are, reading and writing them, tokens, devices, memory."""
