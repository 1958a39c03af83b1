"""Private classification, dialogs and adapters."""
