"""What is measured on the test questions: accuracy, cost, and the analyses by layer."""
