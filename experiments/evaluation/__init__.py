"""What is measured on the test questions: accuracy, and the analyses by layer."""
