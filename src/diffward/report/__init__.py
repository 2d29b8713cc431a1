"""What an audit says: verdict rules, report.json, report.html, the gate."""
