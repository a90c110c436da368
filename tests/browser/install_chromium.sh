#!/bin/sh
# Installs a Chromium for the tests in tests/browser: Debian's and Ubuntu's package as root, else the
# one that playwright brings.
set -e
if command -v chromium >/dev/null 2>&1; then
  chromium --version
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends chromium
else
  "${PYTHON:-.venv/bin/python}" -m playwright install chromium
fi
