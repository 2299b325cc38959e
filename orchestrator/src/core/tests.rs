//! The cluster's decisions, event by event.
