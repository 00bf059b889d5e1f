"""Tests that need Cuckoo3's packages (common, machineries, node; core for `cuckoo-hosted`)."""
