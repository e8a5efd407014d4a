"""Job table and queues on NATS JetStream."""
