"""Replication for Dovecot: watches index logs, queues users, runs dsync to the peers."""

__version__ = "0.1.0"
