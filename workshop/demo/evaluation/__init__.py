"""Measures a trained demo set on identities that no training picture shows."""
