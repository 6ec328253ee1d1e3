"""What crosses the trust boundary: messages, framing and the shared-memory channel. The door is `messages`."""
