"""Prompts whose answers repeat much of the prompt: tasks on a text or a program that the prompt contains."""

from __future__ import annotations

FERRY = (
    "The ferry between Holm and Sandvik was built in 1962 and carried cars for almost fifty years. In 2011 the bridge was "
    "opened, and the company wanted to scrap the ship. A group of former sailors bought it for one crown and spent four "
    "years repairing the engine. Since 2016 the ferry sails again every Sunday in summer. Tickets are sold on board, "
    "children under twelve travel free, and dogs are welcome on the upper deck. Last year 14,300 passengers made the trip, "
    "more than in any year since the bridge was opened. The money pays for the harbour's small museum, which shows how the "
    "sailors lived."
)
NOTICE = (
    "Dear neighbours, on Tuesday the water in our street will be turned off from nine in the morning until three in the "
    "afternoon, because the pipes below the crossing have to be replaced. Please fill some bottles the evening before, do "
    "not use the washing machine, and let the tap run for two minutes when the water is back. If you have questions, call "
    "Mrs. Lind in the office on the ground floor. She knows the plan of the works and has a list of the houses that are "
    "affected."
)
LETTER = (
    "Hi Anna, i wanted to tell you that the meeting on monday is moved to wednesday at ten, becuase the room is beeing "
    "painted. Can you please bring the numbers from the last quarter and the list of the new costumers? Peter will show the"
    " plans for the new shop, and after that we have to decide who travels to the fair in october. If wednesday is bad for "
    "you, let me know untill friday, and i will look for a other day."
)
BATTERY = (
    "The pump has three lamps. A green lamp means that the battery is full. A yellow lamp means that the battery lasts for "
    "less than two hours. A red lamp means that the filter is blocked and must be changed before the pump is used again. To"
    " change the filter, press the two grey buttons on the left side, pull the cover towards you, take the old filter out, "
    "and push the new filter in until it clicks. Keep the button with the drop pressed for five seconds to tell the pump "
    "that the filter is new. The pump must not be used under water deeper than thirty metres."
)
STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        if not self.items:
            raise IndexError("peek at an empty stack")
        return self.items[-1]

    def __len__(self):
        return len(self.items)"""
ORDERS = """def total_price(orders, tax):
    total = 0
    for order in orders:
        if order["status"] == "cancelled":
            continue
        price = order["price"] * order["count"]
        if order["count"] >= 10:
            price = price * 0.9
        total = total + price
    return total * (1 + tax)


def count_open(orders):
    count = 0
    for order in orders:
        if order["status"] == "open":
            count = count + 1
    return count"""
SETTINGS = """{
  "server": {"host": "localhost", "port": 8080, "workers": 4},
  "database": {"host": "localhost", "port": 5432, "name": "shop", "user": "reader"},
  "cache": {"host": "localhost", "port": 6379, "seconds": 300},
  "log": {"level": "info", "file": "shop.log"}
}"""

EDIT = (
    f"Correct the spelling and grammar of this letter, and change nothing else:\n\n{LETTER}",
    f"Repeat this notice word for word, but say Thursday instead of Tuesday:\n\n{NOTICE}",
    f"Rewrite this class with a docstring for each method. Give the whole class.\n\n```python\n{STACK}\n```",
    f"Rename the variable `orders` to `purchases` in this code and give all of it.\n\n```python\n{ORDERS}\n```",
    f"Set every host in this JSON to db.example.org and print the whole JSON again.\n\n```json\n{SETTINGS}\n```",
    f"Write the following text again, with each sentence on a line of its own:\n\n{FERRY}",
)
ASK = (
    f"Summarise this text in three sentences.\n\n{FERRY}",
    f"{FERRY}\n\nWho bought the ship, what did they pay, and what is the money used for? Quote the sentences that say so.",
    f"Summarise this notice as a list of what the neighbours should do.\n\n{NOTICE}",
    f"{BATTERY}\n\nThe red lamp is on. What do I have to do, step by step?",
    f"{BATTERY}\n\nWhat do the three lamps mean?",
    f"Explain what each method of this class does.\n\n```python\n{STACK}\n```",
)
